"""From data set files to training batches: manifests, decoding, sampling, augmentation; the embedded motion set."""
