"""Foundations: modules, layers, attention, resampling, images, paths, configs and errors."""
