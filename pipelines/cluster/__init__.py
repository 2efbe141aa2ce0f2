"""The Ray cluster: session, capacity, and the private parts of Ray that we use."""
