"""Find objects: boxes, classes and masks, by parts of torchvision put together as detectron2 does."""
