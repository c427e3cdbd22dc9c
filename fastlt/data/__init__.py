"""From a pack to batches on the device: plan, loader, engines and augmentation."""
