"""Checks of the training step, through the forward that training uses.

- `check_training`: times, class dropping, noised input, logits, loss
- gradients of every trained parameter, by name
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn import functional

from l2d.network.diffusion_path import NoisedTargets, PathInputs
from l2d.released import parameter_name
from tests.parity.context import Context
from tests.parity.report import TOLERANCES

_IGNORED = -100


def check_training(context: Context) -> None:
    """Everything under `train.`."""
    case, record = context.case, context.record
    if not case.has("train.labels"):
        return
    if case.has("train.t"):
        with record.attempt("training input", "train.t"):
            expected = case.given("train.u") * (1 - context.model.config.min_noise)
            record.close("training input", "train.t", expected, case.expected("train.t"))
    if case.has("train.class_labels_after_drop"):
        with record.attempt("training classes", "train.class_labels_after_drop"):
            _check_dropping(context)
    for quantity, check in (
        ("training input", _check_all_positions),
        ("training logits", _check_logits),
        ("training loss", _check_loss_and_gradients),
    ):
        with record.attempt(quantity, "training step"):
            check(context)


def _check_dropping(context: Context) -> None:
    """Where `drop_u < dropout` a token's class is "no class", the last index of the model's class embedding."""
    case = context.case
    none = context.model.path.class_embedding.weight.shape[0] - 1
    dropped = case.given("train.drop_u") < case.flow["guidance_modulation_training_dropout"]
    own = case.given("train.class_labels")[:, None].expand_as(dropped).masked_fill(dropped, none)
    want = case.expected("train.class_labels_after_drop")
    context.record.same("training classes", "train.class_labels_after_drop", own, want)


def _targets(context: Context, everywhere: bool) -> tuple[NoisedTargets, torch.Tensor]:
    """Training targets with one draw, and the (row, position) pairs (N, 2) they stand for.

    At labelled positions only, as training does, or `everywhere`, where unlabelled ones count as token 0.
    """
    case = context.case
    labels = case.given("train.labels")
    asked = torch.ones_like(labels, dtype=torch.bool) if everywhere else labels != _IGNORED
    width = int(asked.sum(1).max())
    order = (~asked).int().argsort(dim=1, stable=True)[:, :width]  # asked positions first, padded with others
    taken = asked.gather(1, order)

    def at(key: str) -> torch.Tensor:
        values = case.given(key)
        where = order if values.dim() == 2 else order[..., None].expand(-1, -1, values.shape[-1])
        return values.gather(1, where)[None]

    classes = at("train.class_labels_after_drop") if case.has("train.class_labels_after_drop") else None
    targets = NoisedTargets(
        index=order.masked_fill(~taken, -1),
        targets=labels.clamp(min=0).gather(1, order),
        time=at("train.t"),
        noise=at("train.noise_unit"),
        classes=classes,
    )
    return targets, torch.nonzero(asked)


@contextlib.contextmanager
def _seen_inputs(context: Context) -> Iterator[list[torch.Tensor]]:
    """The noised states (N, d) that reach the path's input projection meanwhile."""
    seen: list[torch.Tensor] = []
    projection = context.model.path.input_projection
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    try:
        yield seen
    finally:
        handle.remove()


def _check_all_positions(context: Context) -> None:
    """`train.x_t`, as the model's own noising makes it at all positions."""
    case = context.case
    if not case.has("train.x_t"):
        return
    want = case.expected("train.x_t")
    targets, places = _targets(context, everywhere=True)
    with torch.no_grad(), _seen_inputs(context) as seen:
        context.model(case.given("train.input_ids"), noised_targets=targets)
    # A state of noise_std 64 is a float32 number of some hundreds: allow for its rounding.
    tolerance = max(TOLERANCES["training input"], 2 * torch.finfo(torch.float32).eps * want.abs().max().item())
    made = torch.zeros_like(want)
    made[places[:, 0], places[:, 1]] = torch.cat(seen).float()
    context.record.close("training input", "train.x_t", made, want, tolerance=tolerance)


def _check_logits(context: Context) -> None:
    """`train.logits` at all positions."""
    case = context.case
    if not case.has("train.logits"):
        return
    ids = case.given("train.input_ids")
    index = torch.arange(ids.shape[1]).expand_as(ids)
    classes = case.given("train.class_labels_after_drop") if case.has("train.class_labels_after_drop") else None
    inputs = PathInputs(index, case.given("train.x_t"), case.given("train.t"), classes)
    with torch.no_grad():
        got = context.model.paths.path_logits(context.model.paths.main_path(ids), inputs)
    context.record.close("training logits", "train.logits", got, case.expected("train.logits"))


def _check_loss_and_gradients(context: Context) -> None:
    case, record, model = context.case, context.record, context.model
    targets, _ = _targets(context, everywhere=False)
    model.zero_grad()
    model.train()
    try:
        output = model(case.given("train.input_ids"), noised_targets=targets)
        loss = output.nll.sum() / output.valid.sum()
        loss.backward()
    finally:
        model.eval()
    if case.has("train.loss"):
        record.close("training loss", "train.loss", loss, case.expected("train.loss"))
    if case.has("train.logits"):
        _check_token_losses(context, targets, output.nll)
    _check_gradients(context)
    touched = [name for name, parameter in model.base.named_parameters() if parameter.grad is not None]
    record.equal("frozen base", "parameters with a gradient", touched, [])
    model.zero_grad()


def _check_token_losses(context: Context, targets: NoisedTargets, nll: torch.Tensor) -> None:
    """Each token's loss against the cross-entropy of the fixture's logits."""
    labels = context.case.given("train.labels")
    logits = context.case.given("train.logits")
    want = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="none")
    want = want.view_as(labels).gather(1, targets.index.clamp(min=0))
    tolerance = 2 * TOLERANCES["training logits"]
    context.record.close("training loss", "per token", nll[0], want, where=targets.index >= 0, tolerance=tolerance)


def _check_gradients(context: Context) -> None:
    """Every reference gradient against the parameter it belongs to, and no trained parameter left over."""
    case, record = context.case, context.record
    names = list(case.meta.get("trainable") or [])
    names += [key[11:] for key, _ in case.keys(r"train\.grad\..+") if key[11:] not in names]
    trained = dict(context.model.trained_parameters())
    zero = set(case.meta.get("zero_gradient_parameters") or [])
    total = torch.stack([p.grad.norm() for p in trained.values() if p.grad is not None]).norm().item()
    matched = set()
    for name in names:
        with record.attempt("gradient", name):
            own_name, transposed = parameter_name(name) or (name, False)
            matched.add(own_name)
            gradient = trained[own_name].grad
            gradient = torch.zeros_like(trained[own_name]) if gradient is None else gradient
            key = f"train.grad.{name}"
            want = case.expected(key) if case.has(key) else None
            want = want.t() if transposed and want is not None else want
            vanishing = TOLERANCES["zero gradient"]
            if name in zero or (want is not None and want.norm() <= vanishing * total):
                record.measured("zero gradient", name, gradient.norm().item() / total, vanishing)
            elif want is None:
                record.fail("gradient", name, "the fixture has no gradient of this trainable parameter")
            else:
                record.relative("gradient", name, gradient, want)
    record.equal("gradient", "trained parameters without a counterpart", sorted(set(trained) - matched), [])
    if (norm := case.meta.get("train_grad_global_norm")) is not None:
        record.measured("gradient norm", "all", abs(total - norm) / norm, TOLERANCES["gradient norm"])
