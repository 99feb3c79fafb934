"""Upkeep of an image file: backups, restoring, verification, packing, and the schedule of these.

Knows the image and nothing above it. Everything but packing reads the image's file from outside, so it works
with a kernel and without one.
"""
