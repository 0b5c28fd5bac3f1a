"""The worker: tokenises, batches, runs an engine and answers HTTP. Needs neither torch, mlflow nor prefect."""
