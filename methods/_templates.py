"""Prompts of several templates, for methods that score the training images with each template of the ensemble.

Shapes: T templates, B images in a call, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods._torch import Tensor
from methods._training import affordable
from methods.base import Bill, Classes, Plan, Remaining, TaskShape, TextPrompts


@dataclass(frozen=True, kw_only=True)
class TemplatesPlan(Plan):
    """How many templates the allotment pays for."""

    templates: int


def plan_templates(shape: TaskShape, remaining: Remaining, template: Bill) -> TemplatesPlan:
    """Return the plan of a method that pays `template` for each template of the ensemble, as many as it can pay."""
    templates = affordable(shape.n_templates, template, remaining)
    return TemplatesPlan(bill=template * templates, templates=templates)


def template_prompts(classes: Classes, templates: int) -> TextPrompts:
    """Return the prompt sets of the first templates of the data set's ensemble; of its template if it has none."""
    return TextPrompts(classes.ensemble().texts[:templates])


def by_image(answers_TBC: Tensor) -> Tensor:
    """Return the answers of each image in one row, template by template, [B, T * C]."""
    return answers_TBC.transpose(0, 1).flatten(1)
