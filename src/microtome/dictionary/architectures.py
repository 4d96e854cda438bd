"""Which rule belongs to which architecture."""

from collections.abc import Sequence
from typing import Any

from microtome.dictionary.config import DictionaryConfig
from microtome.dictionary.gated import GatedRule
from microtome.dictionary.jumprelu import JumpReLURule
from microtome.dictionary.rules import BatchTopKRule, MatryoshkaRule, PAnnealRule, ReLURule, Rule, TopKRule

RULES: dict[str, type[Rule[Any]]] = {
    "standard": ReLURule,
    "p_anneal": PAnnealRule,
    "gated": GatedRule,
    "jumprelu": JumpReLURule,
    "topk": TopKRule,
    "batchtopk": BatchTopKRule,
    "matryoshka": MatryoshkaRule,
}


def make_rule(configs: Sequence[DictionaryConfig]) -> Rule[Any]:
    """The rule for a stack of these members, which are of one architecture."""
    return RULES[configs[0].architecture](list(configs))
