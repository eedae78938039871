"""Networks for CT windows: shapes, first weights, HU to floats, weights in folders. To import, torch and numpy suffice.

>>> model = dinox_model.build("vit_s", in_channels=3)
>>> features = dinox_model.encode(model, hu, spacing_mm)
"""

from dinox_model.attention_maps import AttentionMaps as AttentionMaps
from dinox_model.attention_maps import attention_maps as attention_maps
from dinox_model.config import PRESETS as PRESETS
from dinox_model.config import ViTConfig as ViTConfig
from dinox_model.convert.export import save_pretrained as save_pretrained
from dinox_model.convert.pretrained import load_pretrained as load_pretrained
from dinox_model.convert.report import Report as Report
from dinox_model.draws import Draws as Draws
from dinox_model.draws import draw_from as draw_from
from dinox_model.export import export_package as export_package
from dinox_model.heads import PrototypeHead as PrototypeHead
from dinox_model.package import Package as Package
from dinox_model.package import PackageError as PackageError
from dinox_model.package import PackageFacts as PackageFacts
from dinox_model.package import load_package as load_package
from dinox_model.package import read_facts as read_facts
from dinox_model.preprocess import Preprocess as Preprocess
from dinox_model.preprocess import encode as encode
from dinox_model.preprocess import normalise as normalise
from dinox_model.preprocess import window_hu as window_hu
from dinox_model.vit import VisionTransformer as VisionTransformer
from dinox_model.vit import ViTFeatures as ViTFeatures
from dinox_model.vit import build as build
from dinox_model.weights import WeightsError as WeightsError
from dinox_model.weights import load as load
from dinox_model.weights import save as save
