"""Images and labels: reading, augmentation, sampling."""
