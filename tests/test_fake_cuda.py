"""The CUDA path without a GPU: fake tensors on cuda:0 have shapes, dtypes and devices, but no values. Mixed devices and
whatever needs a value on the host raise an error."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ablate
import main as pretraining
import simsiam
from simsiam.resnet import ResNet
from utils.augment import Draws, draw_views
from utils.knn import extract_features, knn_predict

CUDA = torch.device("cuda", 0)
OPTIONS = {tuple(options.replace("WARMUP", "1").split()): name for name, options in ablate.VARIANTS.items()
           if "--batch_size" not in options}
pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch that is built with CUDA")


@pytest.fixture(autouse=True)
def autocast_available(monkeypatch):
    """Autocast asks the driver."""
    torch.compiler.reset()
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: True)
    monkeypatch.setattr("utils.device.has_tensor_cores", lambda device: True)


def fake_step(options, make_backbone):
    """The forward function of main.py, and its arguments on the fake GPU."""
    words = ["--precision", "bf16", "--dim", "16", "--pred_dim", "8", "--width", "4", "--batch_size", "8"]
    args = pretraining.make_parser().parse_args([*words, *options])
    args.steps, args.bn_batch = 1, args.batch_size
    with CUDA:
        model = simsiam.SimSiam(make_backbone(), args.dim, args.pred_dim, args.num_proj_layers, args.head_bn,
                                args.predictor, args.stop_gradient)
        images = torch.empty(8, 3, 32, 32, dtype=torch.uint8)
    draws = [Draws(*(field.to(CUDA) for field in draw_views(8, torch.Generator().manual_seed(0))))
             for _ in range(args.views)]
    return pretraining.make_forward(args, model, CUDA), (images, 32, draws)


class NoTransfer(TorchDispatchMode):
    """Fails if an operation moves data between the host and the GPU, or waits for the GPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        devices = {each.device for each in torch.utils._pytree.tree_leaves((args, kwargs, result))
                   if torch.is_tensor(each)}
        assert len(devices) <= 1, operation
        assert operation not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), operation
        return result


@pytest.mark.parametrize("options", OPTIONS, ids=OPTIONS.values())
def test_a_step_runs_on_the_gpu_without_waiting_for_it(options):
    with FakeTensorMode():
        forward, inputs = fake_step(options, lambda: simsiam.resnet18(4))
        with NoTransfer():
            loss, std = forward(*inputs)
    for value in (loss, std):
        assert value.device == CUDA and value.dtype == torch.float32 and value.shape == ()
    assert loss.requires_grad and not std.requires_grad


@pytest.mark.parametrize("options", [
    pytest.param(options, id=name, marks=() if name in ("default", "asymmetric-2x") else pytest.mark.slow)
    for options, name in OPTIONS.items()])
def test_a_step_is_one_graph(options):
    """In each size of views one graph, and no more."""
    graphs, sizes = [], (16, 32, 16, 32) if OPTIONS[options] == "default" else (32,)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with FakeTensorMode():
        forward, inputs = fake_step(options, lambda: ResNet((1, 1, 1, 1), 4))
        compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)
        for size in sizes:
            compiled(inputs[0], size, inputs[2])
    assert len(graphs) == len(set(sizes))


def test_features_and_neighbors_stay_on_the_gpu():
    with FakeTensorMode():
        with CUDA:
            backbone, images = simsiam.resnet18(4), torch.empty(700, 3, 32, 32, dtype=torch.uint8)
            labels = torch.empty(700, dtype=torch.int64)
        autocast = pretraining.devices.autocast(CUDA, "bf16")
        with NoTransfer():
            features = extract_features(backbone, images, autocast)
            predicted = knn_predict(features[:300], features, labels, 200, 0.1, 10)
    assert features.shape == (700, 32) and features.device == predicted.device == CUDA
    assert predicted.shape == (300,) and predicted.dtype == torch.int64


def test_the_modes_notice_transfers_and_waiting():
    with FakeTensorMode():
        value = torch.empty(3, device=CUDA)
        for move in (value.cpu, value.nonzero, value.sum().item):
            with NoTransfer(), pytest.raises(Exception):
                move()
        with pytest.raises(Exception):
            value + torch.empty(3)
