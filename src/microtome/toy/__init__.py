"""Floor 1: toy models of superposition, and synthetic data whose true features are known.

The parts need torch, so they are fetched when first used.
"""

from typing import TYPE_CHECKING

from microtome.common.lazy import lazy

_HOMES = {
    "Independent": "microtome.toy.firing",
    "Together": "microtome.toy.firing",
    "Apart": "microtome.toy.firing",
    "Hierarchy": "microtome.toy.firing",
    "Copula": "microtome.toy.firing",
    "Blocks": "microtome.toy.firing",
    "zipf": "microtome.toy.firing",
    "spaced": "microtome.toy.firing",
    "Features": "microtome.toy.features",
    "FixedData": "microtome.toy.features",
    "fixed_data": "microtome.toy.features",
    "unit_norm": "microtome.toy.features",
    "ToyConfig": "microtome.toy.models",
    "ToyModel": "microtome.toy.models",
    "TrainToyConfig": "microtome.toy.training",
    "ToyTraining": "microtome.toy.training",
    "train_toy": "microtome.toy.training",
    "STICKY": "microtome.toy.geometry",
    "angle_gaps": "microtome.toy.geometry",
    "cosines": "microtome.toy.geometry",
    "dimensionality": "microtome.toy.geometry",
    "dimensions_per_feature": "microtome.toy.geometry",
    "groups": "microtome.toy.geometry",
    "interference": "microtome.toy.geometry",
    "n_represented": "microtome.toy.geometry",
    "polygon": "microtome.toy.geometry",
    "shape": "microtome.toy.geometry",
    "simplex": "microtome.toy.geometry",
    "square_antiprism": "microtome.toy.geometry",
    "PhaseDiagram": "microtome.toy.phase",
    "boundary": "microtome.toy.phase",
    "phase_diagram": "microtome.toy.phase",
    "Vulnerability": "microtome.toy.adversarial",
    "vulnerability": "microtome.toy.adversarial",
    "DoubleDescentConfig": "microtome.toy.descent",
    "DataSetSize": "microtome.toy.descent",
    "double_descent": "microtome.toy.descent",
    "SyntheticData": "microtome.toy.synthetic",
    "Recovery": "microtome.toy.synthetic",
    "recovery": "microtome.toy.synthetic",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from microtome.toy.adversarial import Vulnerability as Vulnerability
    from microtome.toy.adversarial import vulnerability as vulnerability
    from microtome.toy.descent import DataSetSize as DataSetSize
    from microtome.toy.descent import DoubleDescentConfig as DoubleDescentConfig
    from microtome.toy.descent import double_descent as double_descent
    from microtome.toy.features import Features as Features
    from microtome.toy.features import FixedData as FixedData
    from microtome.toy.features import fixed_data as fixed_data
    from microtome.toy.features import unit_norm as unit_norm
    from microtome.toy.firing import Apart as Apart
    from microtome.toy.firing import Blocks as Blocks
    from microtome.toy.firing import Copula as Copula
    from microtome.toy.firing import Hierarchy as Hierarchy
    from microtome.toy.firing import Independent as Independent
    from microtome.toy.firing import Together as Together
    from microtome.toy.firing import spaced as spaced
    from microtome.toy.firing import zipf as zipf
    from microtome.toy.geometry import STICKY as STICKY
    from microtome.toy.geometry import angle_gaps as angle_gaps
    from microtome.toy.geometry import cosines as cosines
    from microtome.toy.geometry import dimensionality as dimensionality
    from microtome.toy.geometry import dimensions_per_feature as dimensions_per_feature
    from microtome.toy.geometry import groups as groups
    from microtome.toy.geometry import interference as interference
    from microtome.toy.geometry import n_represented as n_represented
    from microtome.toy.geometry import polygon as polygon
    from microtome.toy.geometry import shape as shape
    from microtome.toy.geometry import simplex as simplex
    from microtome.toy.geometry import square_antiprism as square_antiprism
    from microtome.toy.models import ToyConfig as ToyConfig
    from microtome.toy.models import ToyModel as ToyModel
    from microtome.toy.phase import PhaseDiagram as PhaseDiagram
    from microtome.toy.phase import boundary as boundary
    from microtome.toy.phase import phase_diagram as phase_diagram
    from microtome.toy.synthetic import Recovery as Recovery
    from microtome.toy.synthetic import SyntheticData as SyntheticData
    from microtome.toy.synthetic import recovery as recovery
    from microtome.toy.training import ToyTraining as ToyTraining
    from microtome.toy.training import TrainToyConfig as TrainToyConfig
    from microtome.toy.training import train_toy as train_toy
else:
    __getattr__, __dir__ = lazy(__name__, _HOMES)
