"""selfadapt for segmentation_models_pytorch, TorchScript files and other plain networks."""

from selfadapt_smp._adapter import DEMO_MODEL as DEMO_MODEL
from selfadapt_smp._adapter import SmpAdapter as SmpAdapter
from selfadapt_smp._decode import Decode as Decode
