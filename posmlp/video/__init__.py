"""From data set files to training batches: manifest, decode, sampling, augmentation, and the embedded data set."""
