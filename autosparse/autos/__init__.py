"""AutoS: features, network, fit."""
