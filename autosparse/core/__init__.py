"""What has no opinion: errors, files, locks, progress, versions, settings."""
