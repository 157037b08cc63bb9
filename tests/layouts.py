"""Checkpoints as other SimSiam code writes them, from the key layouts that it publishes, and what their networks compute."""
import torch
import torchvision


def reference(arch="resnet18", stem_padding=1, fc=None):
    """torchvision's ResNet with a CIFAR stem, its batch norms in the state of a trained network's."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)()
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, stem_padding, bias=False)
    model.maxpool = torch.nn.Identity()
    model.fc = torch.nn.Identity() if fc is None else fc
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
    """The names of kuangliu's ResNets, which the scripts for CIFAR take over."""
    return {name.replace("downsample", "shortcut"): value for name, value in tensors.items()}


def mlp(*layers):
    """Linear layers and batch norms, layer1.0, layer1.1, ... as the scripts name them."""
    return {
        f"{layer}.{name}": value for layer in layers
        for name, value in torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).state_dict().items()
    }


def numbered(tensors, places):
    """The names in an nn.Sequential of the network's children: places are their numbers."""
    return {
        ".".join((str(places[name.split(".")[0]]), *name.split(".")[1:])): value for name, value in tensors.items()
    }


CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


def reza_safdari():
    model = reference()
    own = with_shortcuts(model.state_dict())
    names = {
        **under("backbone.", own), **under("projector.", mlp("layer1", "layer2", "layer3")), **under("encoder.0.", own),
        **under("encoder.1.", mlp("layer1", "layer2", "layer3")), **under("predictor.", mlp("layer1")),
    }
    return model, {"epoch": 800, "arch": "resnet18", "state_dict": names, "optimizer": {"state": {}}, "top1_acc": 86.5}


def patrick_hua():
    model = reference()
    names = {
        **under("backbone.", model.state_dict()), **under("projector.", mlp("layer1", "layer3")), **under("encoder.0.", model.state_dict()),
        **under("encoder.1.", mlp("layer1", "layer3")), **under("predictor.", mlp("layer1")),
    }
    return model, {"epoch": 800, "state_dict": under("module.", names)}


def patrick_hua_early():
    """Its first version: the encoder is a Sequential of torchvision's children and the projector."""
    model = reference()
    places = dict(zip(CHILDREN, (0, 1, 4, 5, 6, 7)))
    names = {**under("encoder.", numbered(model.state_dict(), places)), **under("encoder.9.", mlp("layer1")), **under("predictor.", mlp("layer1"))}
    return model, {"epoch": 100, "state_dict": names}


def lightly():
    """The benchmark: a Sequential of the children of lightly's own ResNet, and an average pooling. The ReLU after the stem
    is no child there: it is called in the forward method, and so the Sequential is without."""
    model = reference()
    model.relu = torch.nn.Identity()
    names = numbered(with_shortcuts(model.state_dict()), dict(zip(CHILDREN, range(6))))
    heads = {**under("projection_head.", mlp("layers.0")), **under("prediction_head.", mlp("layers.0"))}
    return model, {"epoch": 800, "pytorch-lightning_version": "1.5.10", "state_dict": {**under("backbone.", names), **heads}}


def lightly_torchvision():
    model = reference()
    heads = {**under("projection_head.", mlp("layers.0")), **under("prediction_head.", mlp("layers.0"))}
    return model, {"epoch": 800, "pytorch-lightning_version": "2.1", "state_dict": {**under("backbone.", model.state_dict()), **heads}}


def solo_learn(prefix="backbone."):
    model = reference(stem_padding=2)
    heads = {**under("classifier.", mlp("0")), **under("projector.", mlp("0")), **under("predictor.", mlp("0"))}
    return model, {"epoch": 1000, "pytorch-lightning_version": "1.6", "state_dict": {**under(prefix, model.state_dict()), **heads}}


def solo_learn_early():
    return solo_learn("encoder.")


def facebookresearch():
    """With a CIFAR stem, as its forks have; the projector sits inside fc."""
    model = reference()
    names = {
        **under("encoder.", model.state_dict()), **under("encoder.fc.", mlp("0", "3", "6")), **under("predictor.", mlp("0")),
    }
    return model, {"epoch": 100, "arch": "resnet18", "state_dict": under("module.", names), "optimizer": {"state": {}}}


def torchvision_downsample():
    model = reference(fc=torch.nn.Linear(512, 10))
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    model.fc = torch.nn.Identity()
    return model, tensors


def bare_shortcut():
    model = reference()
    return model, under("_orig_mod.", with_shortcuts(model.state_dict()))


LAYOUTS = {
    reza_safdari: "Reza-Safdari", patrick_hua: "PatrickHua", patrick_hua_early: "encoder.", lightly: "lightly",
    lightly_torchvision: "lightly", solo_learn: "solo-learn", solo_learn_early: "solo-learn",
    facebookresearch: "facebookresearch", torchvision_downsample: "the state dict of a CIFAR ResNet",
    bare_shortcut: "the state dict of a CIFAR ResNet",
}
