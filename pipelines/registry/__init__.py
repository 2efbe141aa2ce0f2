"""What MLflow keeps besides runs: data sets, logged models and registered models."""
