"""The store of finished IRP runs."""
