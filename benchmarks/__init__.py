"""Speed, as ratios against a named peer measured in turn with it in the same run."""
