"""Compression: trained networks with fewer blocks, without training, and healed by distillation."""

from odenets.depth.compression.compression import Compression, compress
from odenets.depth.compression.healing import heal
from odenets.depth.compression.loading import load_compressed

__all__ = ["Compression", "compress", "heal", "load_compressed"]
