"""Naming collapse: which sign of it a run shows, what causes it as a rule, and which knob to turn."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Symptom:
    """One sign of collapse: its `name`, and a `message` for a person: what is seen, why as a rule, what to turn."""

    name: str
    message: str


def find_collapse(loss: float, chance_loss: float, signals: Mapping[str, float]) -> list[Symptom]:
    """The signs of collapse in a stretch of training.

    Args:
        loss: mean loss of the stretch.
        chance_loss: ln of the number of answers (`Method.chance_loss`).
        signals: means over the stretch of what the method reported (`PairLosses.signals`); unknown names are ignored.

    Returns:
        The symptoms, most telling first; empty for a healthy stretch.
    """
    symptoms = []
    if (std := signals.get("feature_std", math.inf)) < 0.02:
        symptoms.append(
            Symptom(
                "constant features",
                f"features hardly differ between images (deviation {std:.4f} of 1): the network answers the same for "
                "all. Usual cause: learning rate too high, or a teacher that follows too fast. Lower optim.base_lr, "
                "raise method.momentum, or lengthen the warm-up",
            )
        )
    entropy = signals.get("target_entropy", math.nan)
    if entropy > 0.995:
        symptoms.append(
            Symptom(
                "uniform targets",
                f"targets are uniform over all outputs (entropy {entropy:.3f} ln K): they say nothing. Usual cause: "
                "targets too soft for the spread of the outputs. Lower method.teacher_temperature (DINO) or "
                "method.epsilon (SwAV), or method.outputs / method.prototypes for small data",
            )
        )
    if entropy < 0.005:
        symptoms.append(
            Symptom(
                "one-hot targets",
                f"targets are all but one-hot (entropy {entropy:.4f} ln K). Usual cause: targets too sharp. Raise "
                "method.teacher_temperature (DINO) or method.epsilon (SwAV)",
            )
        )
    if (used := signals.get("prototypes_used", math.inf)) < 0.05:
        symptoms.append(
            Symptom(
                "few prototypes",
                f"only {used:.1%} of the outputs a batch could use are used. Usual cause: one output wins everywhere. "
                "Lower method.center_momentum (DINO), raise method.iterations (SwAV), or take fewer outputs",
            )
        )
    if abs(loss - chance_loss) < 0.002 * chance_loss:
        symptoms.append(
            Symptom(
                "loss at chance",
                f"the loss stands at ln K = {chance_loss:.3f}: predictions are no better than guessing. Usual cause: "
                "learning rate too low, or targets that say nothing. Raise optim.base_lr, shorten "
                "method.freeze_last_layer_epochs / method.freeze_prototypes_epochs, or lower the target temperature",
            )
        )
    return symptoms
