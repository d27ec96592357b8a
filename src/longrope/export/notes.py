"""What a form means for its user beyond what it loses: the price of one regime, of folding, or of not folding."""

from __future__ import annotations

from longrope.export.forms import UNIFIED, Expression, forced_attention_factor, is_forced


def notes_on(expression: Expression) -> list[str]:
    """One line each, for the model card and the terminal."""
    switch = expression.switch
    wanted, stated = (scaling.windows[-1].attention_factor for scaling in (expression.effective, expression.stated))
    notes = []
    if expression.form == UNIFIED:
        notes.append(
            f"One set of factors at every length: texts of up to {switch} tokens get the long factors too and are not "
            "read as by the source model. That is the price of computing the same in every runtime; `longrope eval` "
            f"on this folder at {switch} tokens measures it."
        )
    if expression.query_scale != 1.0:
        notes.append(
            f"The attention factor {wanted:.6g} is folded into the queries: their weights are multiplied by "
            f"{expression.query_scale:.6g} and rounded to their dtype once, and the config states {stated:.6g}, which "
            "runtimes compute from the lengths whatever it says. Logits are those of the unfolded scaling at every "
            "length up to that rounding. Inside the original window they are close to what they would be unfolded, "
            "not equal bit for bit, and a runtime that drops the scaling computes wrong attention there too."
        )
    elif not is_forced(expression.stated):
        notes.append(
            "MLX and ExLlamaV3 compute an attention factor of "
            f"{forced_attention_factor(expression.stated):.6g} from the lengths whatever the config says; this scaling "
            f"has {stated:.6g}. With --fold-attention-factor all agree."
        )
    return notes
