"""What every package uses: settings, errors, files, locks, progress, versions."""
