"""Where Ray, DeepSpeed and MLflow meet the core. Nothing else imports those three."""

RUN_FILE = "mlflow.json"
"""File in the folder of a study, training or corpus that names its run in MLflow."""
