"""How PosMLP-Video runs on a cluster: ingest, training, tracking, and the command line."""
