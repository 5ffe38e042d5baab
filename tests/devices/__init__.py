"""Every path that users run on a GPU, on a device that is pretended."""
