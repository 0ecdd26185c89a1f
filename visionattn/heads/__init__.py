"""Detectors and segmenters: torchvision's heads and segmentation_models_pytorch's decoders over any backbone."""
