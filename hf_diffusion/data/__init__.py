"""Data for training, as batches that depend on (seed, epoch, index) alone.

To read: protocol.py (what training asks of data), loading.py (the one way in), points.py (a whole
kind of data in one file), then images.py. Images come in through sources.py (listing, addresses,
metadata, columns), become pixels in decoding.py (transforms, probing), and batches in image_data.py
(row_decoder, augmentation, memory) or streaming.py.
"""
