"""What runs record: MLflow, metrics, plots, Prometheus."""
