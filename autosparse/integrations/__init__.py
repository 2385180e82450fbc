"""Where Ray, DeepSpeed and MLflow meet the core. Nothing else imports those three."""
