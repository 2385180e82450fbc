"""Where images come from: named sets, folders, shards."""
