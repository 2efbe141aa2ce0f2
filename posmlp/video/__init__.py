"""From data set files to training batches: manifests, decoding, sampling, augmentation, and the embedded data sets."""
