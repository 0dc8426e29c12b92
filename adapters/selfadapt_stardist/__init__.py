"""StarDist: official networks in PyTorch, adapted, and back."""

from selfadapt_stardist._adapter import StardistAdapter as StardistAdapter
from selfadapt_stardist._network import Architecture as Architecture
from selfadapt_stardist._network import StarDist2D as StarDist2D
from selfadapt_stardist._port import Port as Port
