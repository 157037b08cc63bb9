"""Checkpoints of other SimSiam code, by the tensor names that it publishes: each layout is a function that returns the
network and the content of its file."""
import torch
import torchvision


def reference(arch="resnet18", stem_padding=1):
    """torchvision's ResNet with a CIFAR stem and batch norms like those of a trained network."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)()
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, stem_padding, bias=False)
    model.maxpool = torch.nn.Identity()
    model.fc = torch.nn.Identity()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return model.eval()


def under(prefix, tensors):
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def with_shortcuts(tensors):
    """The names of kuangliu's ResNets, which much code for CIFAR has copied."""
    return {name.replace("downsample", "shortcut"): value for name, value in tensors.items()}


def numbered(tensors, *numbers):
    """The names in an nn.Sequential of the network's children, given their numbers."""
    places = dict(zip(("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"), numbers))
    parts = {name: name.split(".", 1) for name in tensors}
    return {f"{places[child]}.{rest}": tensors[name] for name, (child, rest) in parts.items()}


def mlp(*prefixes):
    """A linear layer and its batch norm under each prefix."""
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).state_dict()
    return {f"{prefix}.{name}": value for prefix in prefixes for name, value in layer.items()}


def twice(tensors, *layers):
    """A backbone and a projector, and both again in an nn.Sequential named encoder."""
    heads = mlp(*(f"{head}.layer{i}" for head in ("projector", "encoder.1") for i in layers), "predictor.layer1")
    return under("backbone.", tensors) | under("encoder.0.", tensors) | heads


def reza_safdari():
    model = reference()
    names = twice(with_shortcuts(model.state_dict()), 1, 2, 3)
    return model, {"epoch": 800, "arch": "resnet18", "state_dict": names, "optimizer": {"state": {}}, "top1_acc": 86.5}


def patrick_hua():
    model = reference()
    return model, {"epoch": 800, "state_dict": under("module.", twice(model.state_dict(), 1, 3))}


def patrick_hua_early():
    """The encoder is an nn.Sequential of torchvision's children and the projector."""
    model = reference()
    names = numbered(model.state_dict(), 0, 1, 4, 5, 6, 7) | mlp("9.layer1")
    return model, {"epoch": 100, "state_dict": under("encoder.", names) | mlp("predictor.layer1")}


def lightly(benchmark=True):
    """The benchmark's backbone is an nn.Sequential of the children of lightly's own ResNet, which calls the ReLU after
    the stem in its forward method: the Sequential has none. Otherwise the backbone is torchvision's."""
    model = reference()
    own = model.state_dict()
    if benchmark:
        model.relu = torch.nn.Identity()
        own = numbered(with_shortcuts(own), *range(6))
    names = under("backbone.", own) | mlp("projection_head.layers.0", "prediction_head.layers.0")
    return model, {"epoch": 800, "pytorch-lightning_version": "1.5.10", "state_dict": names}


def solo_learn(prefix="backbone.", lightning=True):
    """Without Lightning's version beside it, it could be anyone's state dict: the stem is padded by 1."""
    model = reference(stem_padding=2 if lightning else 1)
    names = under(prefix, model.state_dict()) | mlp("classifier.0", "projector.0", "predictor.0")
    return model, {"pytorch-lightning_version": "1.6", "state_dict": names} if lightning else names


def facebookresearch():
    """With the CIFAR stem of its forks; the projector is the encoder's fc."""
    model = reference()
    names = under("encoder.", model.state_dict()) | mlp("encoder.fc.0", "encoder.fc.3", "encoder.fc.6", "predictor.0")
    return model, {"epoch": 100, "arch": "resnet18", "state_dict": under("module.", names), "optimizer": {"state": {}}}


def bare(names=dict, head="fc."):
    model = reference()
    return model, names(model.state_dict()) | under(head, torch.nn.Linear(512, 10).state_dict())


LAYOUTS = {  # the function, and what load_backbone prints of it
    "Reza-Safdari": (reza_safdari, "state_dict.backbone.conv1", "169 more ignored"),
    "PatrickHua": (patrick_hua, "state_dict.module.backbone.conv1", "155 more ignored"),
    "PatrickHua, early": (patrick_hua_early, "state_dict.encoder.0", "14 more ignored"),
    "lightly, benchmark": (lightly, "state_dict.backbone.0", "no ReLU after the stem"),
    "lightly": (lambda: lightly(benchmark=False), "state_dict.backbone.conv1", "14 more ignored"),
    "solo-learn": (solo_learn, "state_dict.backbone.conv1", "stem padded by 2"),
    "solo-learn, early": (lambda: solo_learn("encoder."), "state_dict.encoder.conv1", "stem padded by 2"),
    "solo-learn, state dict": (lambda: solo_learn(lightning=False), " backbone.conv1", "21 more ignored"),
    "facebookresearch": (facebookresearch, "state_dict.module.encoder.conv1", "28 more ignored"),
    "torchvision": (bare, " conv1", "2 more ignored"),
    "kuangliu": (lambda: bare(with_shortcuts, "linear."), " conv1", "2 more ignored"),
}
