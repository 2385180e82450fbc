"""Any timm model: what is prunable in it, and its gradients."""
