"""What is measured on a GPU, stage by stage; see docs/performance.md."""
