"""Checkpoints of other SimSiam code, by the tensor names that it publishes: each layout is a function that turns the
state dict of torchvision's ResNet into the content of such a file."""
import torch
import torchvision


def reference(arch="resnet18", stem_padding=1, stem_relu=True):
    """torchvision's ResNet with a CIFAR stem and batch norms like those of a trained network."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)()
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, stem_padding, bias=False)
    model.maxpool = model.fc = torch.nn.Identity()
    if not stem_relu:
        model.relu = torch.nn.Identity()
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


def reza_safdari(own):
    heads = mlp(*(f"{head}.layer{i}" for head in ("projector", "encoder.1") for i in (1, 2, 3)), "predictor.layer1")
    names = with_shortcuts(under("backbone.", own) | under("encoder.0.", own)) | heads
    return {"epoch": 800, "arch": "resnet18", "state_dict": names, "optimizer": {"state": {}}, "top1_acc": 86.5}


def patrick_hua(own):
    heads = mlp(*(f"{head}.layer{i}" for head in ("projector", "encoder.1") for i in (1, 3)), "predictor.layer1")
    return {"epoch": 800, "state_dict": under("module.", under("backbone.", own) | under("encoder.0.", own) | heads)}


def patrick_hua_early(own):
    """The first version: the encoder is a Sequential of torchvision's children and the projector."""
    encoder = numbered(own, 0, 1, 4, 5, 6, 7) | mlp("9.layer1")
    return {"epoch": 100, "state_dict": under("encoder.", encoder) | mlp("predictor.layer1")}


def lightly(own):
    names = under("backbone.", own) | mlp("projection_head.layers.0", "prediction_head.layers.0")
    return {"epoch": 800, "pytorch-lightning_version": "1.5.10", "state_dict": names}


def lightly_benchmark(own):
    """The backbone is a Sequential of the children of lightly's own ResNet, which calls the ReLU after the stem in its
    forward method: the Sequential has none."""
    return lightly(numbered(with_shortcuts(own), *range(6)))


def solo_learn(own):
    """Without Lightning's version beside it, it could be anyone's state dict: the stem stays as it is here."""
    return under("backbone.", own) | mlp("classifier.0", "projector.0", "predictor.0")


def facebookresearch(own):
    """With the CIFAR stem of its forks; the projector is the encoder's fc."""
    names = under("encoder.", own) | mlp("encoder.fc.0", "encoder.fc.3", "encoder.fc.6", "predictor.0")
    return {"epoch": 100, "arch": "resnet18", "state_dict": under("module.", names), "optimizer": {"state": {}}}


LAYOUTS = {  # the function, and what load_backbone prints of it
    "Reza-Safdari": (reza_safdari, "state_dict.backbone.conv1", "169 more ignored"),
    "PatrickHua": (patrick_hua, "state_dict.module.backbone.conv1", "155 more ignored"),
    "PatrickHua, early": (patrick_hua_early, "state_dict.encoder.0", "14 more ignored"),
    "lightly, benchmark": (lightly_benchmark, "state_dict.backbone.0", "no ReLU after the stem"),
    "lightly": (lightly, "state_dict.backbone.conv1", "14 more ignored"),
    "solo-learn": (lambda own: {"pytorch-lightning_version": "1.6", "state_dict": solo_learn(own)},
                   "state_dict.backbone.conv1", "stem padded by 2"),
    "solo-learn, state dict": (solo_learn, " backbone.conv1", "21 more ignored"),
    "facebookresearch": (facebookresearch, "state_dict.module.encoder.conv1", "28 more ignored"),
    "torchvision": (lambda own: own | under("fc.", torch.nn.Linear(512, 10).state_dict()), " conv1", "2 more ignored"),
    "kuangliu": (lambda own: under("_orig_mod.", with_shortcuts(own)), "_orig_mod.conv1", "0 more ignored"),
}
