"""Adapt a trained pixel-wise model to new images, without labels and without its training data."""

from selfadapt._adapt import AdaptationResult as AdaptationResult
from selfadapt._adapt import adapt as adapt
from selfadapt._adaptation import SelfAdaptation as SelfAdaptation
from selfadapt._adapter import Adapter as Adapter
from selfadapt._config import Config as Config
from selfadapt._crops import Crops as Crops
from selfadapt._errors import AdapterNotFoundError as AdapterNotFoundError
from selfadapt._errors import CheckpointError as CheckpointError
from selfadapt._errors import ConfigError as ConfigError
from selfadapt._errors import ImageError as ImageError
from selfadapt._errors import ModelError as ModelError
from selfadapt._errors import OutputError as OutputError
from selfadapt._errors import SelfAdaptError as SelfAdaptError
from selfadapt._heads import Binary as Binary
from selfadapt._heads import Categorical as Categorical
from selfadapt._heads import Classification as Classification
from selfadapt._heads import Head as Head
from selfadapt._heads import OutputSpec as OutputSpec
from selfadapt._heads import Rays as Rays
from selfadapt._heads import Regression as Regression
from selfadapt._heads import Scalar as Scalar
from selfadapt._heads import Vector as Vector
from selfadapt._images import LazyImage as LazyImage
from selfadapt._images import open_images as open_images
from selfadapt._matching import Matches as Matches
from selfadapt._matching import match as match
from selfadapt._monitors import EmbeddingDrift as EmbeddingDrift
from selfadapt._monitors import FalseNegativeRate as FalseNegativeRate
from selfadapt._monitors import Monitor as Monitor
from selfadapt._monitors import Validation as Validation
from selfadapt._monitors import ViewAgreement as ViewAgreement
from selfadapt._predict import Prediction as Prediction
from selfadapt._predict import predict as predict
from selfadapt._prepare import as_channels_first as as_channels_first
from selfadapt._prepare import is_constant as is_constant
from selfadapt._prepare import normalize_percentile as normalize_percentile
from selfadapt._prepare import normalize_standard as normalize_standard
from selfadapt._prepare import prepare as prepare
from selfadapt._prepare import to_gray as to_gray
from selfadapt._registry import adapters as adapters
from selfadapt._registry import load_adapter as load_adapter
from selfadapt._report import write_report as write_report
from selfadapt._symmetry import D4 as D4
from selfadapt._symmetry import Symmetry as Symmetry

__version__ = "0.1.0"
