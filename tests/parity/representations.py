"""Checks of the small parts: weights, vocabulary table, clean estimates, time, modulation, noisy input.

- `check_weights`: every reference weight has arrived at its place
- `check_vocabulary`, `check_clean_estimates`, `check_time_and_modulation`, `check_inputs`
"""

import torch

from l2d.released import parameter_name
from l2d.sampling.evaluator import clean_estimate
from tests.parity.context import Context


def check_weights(context: Context) -> None:
    """Each `state.*` tensor equals the model's own: trained ones by their new name, frozen ones in the base."""
    case, record = context.case, context.record
    trained = dict(context.model.trained_parameters())
    frozen = context.model.base.state_dict()
    for key in case.state_dict():
        with record.attempt("weights", key):
            want, named = case.expected(f"state.{key}"), parameter_name(key)
            if named is None:
                record.same("weights", key, frozen[_base_name(key)], want)
            else:
                name, transposed = named
                record.same("weights", key, trained[name], want.t() if transposed else want)


def _base_name(key: str) -> str:
    """Name in the base of a frozen reference weight, wrapped ones (`flow_q_proj.wrapped_layer`) included."""
    return key.replace(".wrapped_layer", "").replace("flow_", "") if ".wrapped_layer." in key else key


def check_vocabulary(context: Context) -> None:
    """The table of all tokens' embeddings, and the embeddings of a few tokens."""
    case, record = context.case, context.record
    for key, _ in case.keys(r"flow\.table"):
        with record.attempt("vocabulary table", key):
            record.close("vocabulary table", key, context.model.paths.vocabulary_table(), case.expected(key))
    for key, _ in case.keys(r"flow\.token_repr"):
        with record.attempt("token embeddings", key):
            got = context.model.path.embed_tokens(case.given("flow.token_ids"))
            record.close("token embeddings", key, got, case.expected(key))


def check_clean_estimates(context: Context) -> None:
    """`x1.argmax` and `x1.avg_T<temperature>[_normalized]`: what given logits make the path move towards."""
    case, record = context.case, context.record
    for key, match in case.keys(r"x1\.(argmax|avg_T(?P<temperature>[0-9.]+)(?P<normalized>_normalized)?)"):
        with record.attempt("clean estimate", key):
            choice = "sample" if match["temperature"] is None else "average"
            got, _ = clean_estimate(
                case.given("x1.logits"),
                context.model.paths.vocabulary_table(),
                choice,
                float(match["temperature"] or 0.0),
                normalize=match["normalized"] is not None,
            )
            record.close("clean estimate", key, got, case.expected(key))


def check_time_and_modulation(context: Context) -> None:
    """`temb.*` and `mod.*`, for every class where there are classes."""
    case, record, path = context.case, context.record, context.model.path
    if not case.has("temb.t"):
        return
    time = case.given("temb.t").float()
    embedding = path.time_embedding(time)  # (T, C)
    zero = path.time_embedding(torch.zeros_like(time))
    computed = {
        "temb.freq": lambda: path.time_embedding.features(time),
        "temb.out": lambda: embedding,
        "mod.final": lambda: path.output_modulation(embedding),
        "mod.final_minus_t0": lambda: path.output_modulation(embedding) - path.output_modulation(zero),
        "mod.final_minus_t0_by_class": lambda: _by_class(context, time, lambda made: made.output),
    }
    for key, _ in case.keys(r"(temb|mod)\..+"):
        if key in computed:
            quantity = "time embedding" if key.startswith("temb.") else "modulation"
            with record.attempt(quantity, key):
                record.close(quantity, key, computed[key](), case.expected(key))
    for key, match in case.keys(r"mod\.layer(\d+)(_by_class)?"):
        with record.attempt("modulation", key):
            number = int(match[1])
            if match[2]:
                got = _by_class(
                    context, time, lambda made, number=number: path.layers[number].modulation(made.embedding)
                )
            else:
                got = path.layers[number].modulation(embedding)
            record.close("modulation", key, got, case.expected(key))


def _by_class(context: Context, time: torch.Tensor, pick) -> torch.Tensor:
    """Modulation (T, K + 1, width) of `time` (T,) for every class, "no class" last, as the path computes it."""
    count = context.model.path.class_embedding.weight.shape[0]
    columns = []
    for number in range(count):
        classes = torch.full(time.shape, number)
        columns.append(pick(context.model.path.modulate(time, classes)))
    return torch.stack(columns, dim=1)


def check_inputs(context: Context) -> None:
    """`fwd.x_*` (the noised tokens) and `enc.out_*` (their projection into the hidden stream)."""
    case, record, path = context.case, context.record, context.model.path
    for key, match in case.keys(r"fwd\.x_(.+)"):
        with record.attempt("noised input", key):
            time = case.given(f"fwd.t_{match[1]}").float()[..., None]
            clean = path.embed_tokens(case.given("fwd.target_tokens"))
            record.close("noised input", key, (1 - time) * case.given("fwd.noise") + time * clean, case.expected(key))
    for key, match in case.keys(r"enc\.out_(.+)"):
        with record.attempt("input projection", key):
            time = case.given(f"fwd.t_{match[1]}").float().expand(context.input_ids.shape)
            got = path.input_projection(case.given(f"fwd.x_{match[1]}"), path.input_projection.std(time))
            record.close("input projection", key, got, case.expected(key), where=context.valid)
