"""selfadapt for Cellpose: the networks of versions 3 and 4, whichever is installed."""

from selfadapt_cellpose._adapt import adapt as adapt
from selfadapt_cellpose._adapter import CellposeAdapter as CellposeAdapter
