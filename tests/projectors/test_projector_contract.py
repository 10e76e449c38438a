"""What holds for every registered projector; a new one is tested by being registered."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from prism_deco.projectors import PROJECTORS, Projector, build_projector, square_grid

IN_DIM, OUT_DIM, BATCH = 32, 24, 2
GRID, SIDE = (6, 8), 2
NAMES = PROJECTORS.names()


def build(name: str, in_grid: tuple[int, int] = GRID, side: int = SIDE) -> Projector:
    num_tokens = side**2 if PROJECTORS.get(name).compresses else None
    return build_projector(name, IN_DIM, OUT_DIM, in_grid, num_tokens)


@pytest.fixture(scope="module", params=NAMES)
def shared(request) -> Projector:
    """Built once, and not to be changed: the default widths of some projectors are large."""
    torch.manual_seed(0)
    return build(request.param).eval()


@pytest.fixture
def projector(shared) -> Projector:
    return copy.deepcopy(shared)


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(BATCH, GRID[0] * GRID[1], IN_DIM, generator=torch.Generator().manual_seed(1))


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient reaches {missing}"
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def test_names():
    assert {"linear", "avgpool", "maxpool", "qformer", "c_abstractor", "d_abstractor"} <= set(NAMES)


def test_shapes(shared, features):
    tokens = shared.out_grid[0] * shared.out_grid[1]
    assert shared.in_grid == GRID and shared.num_tokens == tokens
    assert shared.out_grid == ((SIDE, SIDE) if shared.compresses else GRID)
    out = shared(features)
    assert out.shape == (BATCH, tokens, OUT_DIM) and out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            lambda x: x[:, :5, :OUT_DIM],
            r"\[2, 5, 24\]",
        ),  # one would reach the next image
        (lambda x: x[:, :3, :OUT_DIM], r"\[2, 3, 24\]"),
        (lambda x: x[:, :4], r"\[2, 4, 32\]"),
        (lambda x: None, "NoneType"),
    ],
)
def test_visual_tokens_of_another_size_are_refused(made, words, features):
    class Wrong(Projector):
        def project(self, features):
            return made(features)

    with pytest.raises(ValueError, match=rf"Wrong made visual tokens {words} instead of \[2, 4, 24\]"):
        Wrong(IN_DIM, OUT_DIM, GRID, (2, 2))(features)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_grid, side", [((9, 9), 4), ((5, 7), 3), ((4, 4), 4), ((3, 3), 1)], ids=str)
def test_any_grid_and_any_square(name, in_grid, side):
    with torch.device("meta"):
        projector = build(name, in_grid, side)
        out = projector(torch.empty(1, in_grid[0] * in_grid[1], IN_DIM))
    assert out.shape == (1, side**2 if projector.compresses else in_grid[0] * in_grid[1], OUT_DIM)


def test_images_of_a_batch_do_not_mix(shared, features):
    alone = torch.cat([shared(image[None]) for image in features])
    torch.testing.assert_close(shared(features), alone, rtol=1e-4, atol=1e-5)


def test_another_feature_map_is_refused(shared):
    for shape in [(BATCH, 47, IN_DIM), (BATCH, 48, IN_DIM + 1), (48, IN_DIM)]:
        with pytest.raises(ValueError, match=r"48, 32\] \(grid 6x8\)") as error:
            shared(torch.zeros(shape))
        assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("name", [name for name in NAMES if PROJECTORS.get(name).compresses])
@pytest.mark.parametrize(
    "num_tokens, words", [(5, "5.*4 and 9"), (0, "0"), (-4, "-4"), (49, "49.*7x7.*6x8.*36"), (None, "None.*linear")]
)
def test_impossible_numbers_of_tokens_are_refused(name, num_tokens, words):
    with torch.device("meta"), pytest.raises(ValueError, match=f"num_tokens={words}"):
        build_projector(name, IN_DIM, OUT_DIM, GRID, num_tokens)


def test_square_grid():
    assert square_grid(144, (24, 24)) == (12, 12)
    assert square_grid(36, (6, 8)) == (6, 6)


def test_unknown_name():
    with pytest.raises(ValueError, match="Did you mean 'avgpool'"):
        build_projector("avg_pool", IN_DIM, OUT_DIM, GRID, 4)


def test_gradient_reaches_every_parameter(projector, features):
    projector(features).square().sum().backward()
    for name, gradient in gradients(projector).items():
        assert gradient.isfinite().all(), name
        # Vectors may have none for a reason: a softmax does not see the bias of its keys.
        assert gradient.ndim < 2 or gradient.abs().max() > 0, name


def test_checkpointing_gives_equal_gradients(projector, features):
    projector.train()  # with dropout: the second forward pass has to repeat the first one's masks
    inputs = features.requires_grad_()
    results = []
    for run in (projector, lambda x: checkpoint(projector, x, use_reentrant=False)):
        projector.zero_grad()
        inputs.grad = None
        torch.manual_seed(3)
        run(inputs).square().sum().backward()
        results.append({**gradients(projector), "features": inputs.grad})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, msg=name)


def test_bfloat16(projector, features):
    expected = projector(features)
    out = projector.to(torch.bfloat16)(features.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 0.05, f"relative error {error:.3f}"
    out.float().square().sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(projector).values())


def test_autocast(projector, features):
    expected = projector(features)
    with torch.autocast("cpu", torch.bfloat16):
        out = projector(features)
    assert (out.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.slow
def test_compiles_without_graph_breaks(projector, features):
    expected = projector(features)
    expected.square().sum().backward()
    expected_gradients = {name: gradient.clone() for name, gradient in gradients(projector).items()}
    projector.zero_grad()
    torch.compiler.reset()
    out = torch.compile(projector, fullgraph=True, backend="aot_eager")(features)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(projector).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_parameters_are_the_whole_state(shared, features):
    """A projector built on the meta device is complete once its state dict is loaded."""
    name = next(name for name in NAMES if PROJECTORS.get(name) is type(shared))
    with torch.device("meta"):
        empty = build(name).eval()
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    empty.load_state_dict(shared.state_dict(), assign=True)
    torch.testing.assert_close(empty(features), shared(features))


@pytest.mark.parametrize("name", NAMES)
def test_the_caller_owns_the_seed(name):
    def first_matrix(seed: int | None) -> torch.Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return next(p for p in build(name).parameters() if p.ndim > 1 and p.std() > 0).detach()

    first, second, again, other = first_matrix(5), first_matrix(None), first_matrix(5), first_matrix(6)
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(first, other)


def test_query_to_patch(shared):
    shares = shared.query_to_patch()
    if shares is not None:
        assert shares.shape == (shared.num_tokens, GRID[0] * GRID[1])
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(shared.num_tokens))
        assert shares.min() >= 0
