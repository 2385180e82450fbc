"""Where Ray, DeepSpeed and MLflow meet the core. Nothing else imports those three."""

RUN_FILE = "mlflow.json"
"""File in the folder of a study, training or corpus that names its run in MLflow."""
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that is set inside a job of Ray's."""
REFUSED = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
"""Errors of MLflow that are the same at every try: a run that was deleted, a value that it does not
take."""
