"""COCO's average precision: precisions known beforehand, detectors of both kinds, SAM with boxes, hostile files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import coco
import numpy as np
import pytest
import torch
from helpers import FAST, redraw
from language import WIDTH, sam
from torch import Tensor, nn

from repquant_fx.cli import main
from repquant_fx.errors import InputError
from repquant_fx.evaluation import evaluate
from repquant_fx.evaluation.box_prompts import fitted, open_prompted, read_prompts
from repquant_fx.evaluation.coco import Detection, average_precision, encode_mask, read_annotations
from repquant_fx.evaluation.detection import detection
from repquant_fx.evaluation.queries import Queries, categories_of, has_background, objects_of
from repquant_fx.evaluation.runners import Runner
from repquant_fx.options import Source

pytest.importorskip("pycocotools")



class Seer(nn.Module):
    """Finds rectangles by their colours; `shift` moves what it finds to the right."""

    def __init__(self, shift: int = 0, masks: bool = True) -> None:
        super().__init__()
        self.shift, self.masks = shift, masks

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self.see(image) for image in images]

    def see(self, image: Tensor) -> dict[str, Tensor]:
        found = []
        for objects in coco.RECTANGLES:
            for category, x, y, w, h in objects:
                part = image[:, y:y + h, x:x + w]
                if part.shape[1:] == (h, w) and not (part - torch.tensor(coco.COLOURS[category]
                                                                         )[:, None, None] / 255).abs().max() > 0.01:
                    found.append((category, x + self.shift, y, w, h))
        whole = [each for each in found if not any(larger(each, other) for other in found)]
        masks = torch.zeros(len(whole), 1, *image.shape[1:])
        for mask, (_, x, y, w, h) in zip(masks, whole):
            mask[0, y:y + h, x:x + w] = 0.9
        result = {"boxes": torch.tensor([[x, y, x + w, y + h] for _, x, y, w, h in whole], dtype=torch.float32),
                  "labels": torch.tensor([each[0] for each in whole]), "scores": torch.full((len(whole),), 0.8)}
        return {**result, "masks": masks} if self.masks else result


def larger(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether the other holds the first, and more."""
    (_, x, y, w, h), (_, x2, y2, w2, h2) = one, other
    return x2 <= x and y2 <= y and x + w <= x2 + w2 and y + h <= y2 + h2 and one != other


@pytest.mark.parametrize("segment", [coco.polygon, coco.runs])
def test_what_finds_everything_has_a_precision_of_100(tmp_path: Path, segment: coco.Segment) -> None:
    annotations, images = coco.write(tmp_path, segment)
    found = detection(Seer(), images, coco=annotations)
    assert found.images == 4 and (found.box_ap, found.box_ap50, found.mask_ap, found.mask_ap75) == (100,) * 4
    boxes = detection(Seer(masks=False), images, coco=annotations, limit=2)
    assert boxes.box_ap == 100 and boxes.mask_ap is None and boxes.images == 2
    assert "box AP 100.00" in str(boxes) and "mask" not in str(boxes)


def test_a_shift_costs_the_strict_precisions_alone(tmp_path: Path) -> None:
    annotations, images = coco.write(tmp_path)
    found = detection(Seer(shift=1), images, coco=annotations)
    assert found.box_ap50 == 100 and found.box_ap is not None and 50 < found.box_ap < 95
    assert detection(Seer(shift=400), images, coco=annotations).box_ap == 0


def test_compressed_run_lengths_are_read(tmp_path: Path) -> None:
    """As pycocotools writes them."""
    from pycocotools import mask as coding

    def compressed(box: Any, size: tuple[int, int]) -> dict[str, Any]:
        encoded = coding.frPyObjects(coco.runs(box, size), *size)
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}

    annotations, images = coco.write(tmp_path, compressed)
    assert detection(Seer(), images, coco=annotations).mask_ap == 100


@pytest.mark.slow
def test_queries_become_the_objects_of_transformers() -> None:
    from transformers import DeformableDetrImageProcessor, DetrImageProcessor
    from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 6, 5, generator=generator)
    boxes = torch.rand(2, 6, 4, generator=generator) * 0.2 + 0.4
    sizes, output = [(30, 40), (50, 20)], DetrObjectDetectionOutput(logits=logits, pred_boxes=boxes)
    for background, processor, options in ((True, DetrImageProcessor, {}),
                                           (False, DeformableDetrImageProcessor, {"top_k": 30})):
        expected = processor().post_process_object_detection(output, 0.0, sizes, **options)
        for mine, theirs in zip(objects_of(Queries(logits, boxes, None), sizes, background=background), expected):
            order = theirs["scores"].argsort(descending=True)
            assert torch.allclose(mine.scores, theirs["scores"][order])
            assert torch.equal(mine.labels, theirs["labels"][order])
            assert mine.boxes is not None and torch.allclose(mine.boxes, theirs["boxes"][order], atol=1e-4)


def test_masks_without_boxes_are_scored_by_how_sure_they_are() -> None:
    masks = torch.full((1, 2, 4, 4), -5.0)
    masks[0, 0, :2], masks[0, 1, 2:] = 8.0, 0.1
    logits = torch.tensor([[[4.0, 0.0, 0.0], [4.0, 0.0, 0.0]]])
    (found,) = objects_of(Queries(logits, None, masks), [(8, 8)], background=True)
    sure, unsure = (float(found.scores[i]) for i in (0, 1))
    assert found.boxes is None and found.masks is not None and found.masks.shape == (4, 8, 8)
    assert sure > 0.9 and 0.4 < unsure < 0.6


def test_classes_find_their_categories() -> None:
    names = {0: "N/A", 1: "PLATE", 2: "crate"}
    assert categories_of(3, names, coco.CATEGORIES) == [None, 7, 3]
    assert categories_of(8, {0: "LABEL_0"}, coco.CATEGORIES) == [None, None, None, 3, None, None, None, 7]
    assert categories_of(2, None, coco.CATEGORIES) == [3, 7]
    with pytest.raises(InputError, match="has 5 classes"):
        categories_of(5, None, coco.CATEGORIES)
    assert has_background(4, 3, coco.CATEGORIES) and not has_background(3, 3, coco.CATEGORIES)
    assert has_background(3, None, coco.CATEGORIES) and not has_background(8, None, coco.CATEGORIES)
    with pytest.raises(InputError, match="compile into a directory"):
        has_background(30, None, coco.CATEGORIES)


def truth(annotations: Path, found: list[Detection]) -> None:
    """What was found becomes the annotations."""
    stored = json.loads(annotations.read_text())
    stored["annotations"] = [
        {"id": i, "image_id": d.picture, "category_id": d.category, "bbox": list(d.box or (0, 0, 9, 9))}
        | ({"segmentation": {**d.mask, "counts": d.mask["counts"].decode()}} if d.mask else {})
        for i, d in enumerate(found, 1)]
    annotations.write_text(json.dumps(stored))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Detection]:
    """What models find, beside its precision."""
    found: list[Detection] = []

    def noted(annotations: Any, given: list[Detection], pictures: Any) -> Any:
        found[:] = given
        return average_precision(annotations, given, pictures)

    for module in ("detection", "box_prompts"):
        monkeypatch.setattr(sys.modules[f"repquant_fx.evaluation.{module}"], "average_precision", noted)
    return found


def test_a_detector_of_transformers_and_its_file(
    tmp_path: Path, seen: list[Detection], capsys: pytest.CaptureFixture[str]
) -> None:
    """The truth is what the float model finds."""
    import transformers as t

    annotations, images = coco.write(tmp_path)
    torch.manual_seed(0)
    config = t.YolosConfig(**WIDTH, image_size=[16, 16], patch_size=8, num_detection_tokens=4, num_labels=2,
                           id2label={0: "plate", 1: "crate"})
    redraw(t.YolosForObjectDetection(config)).save_pretrained(tmp_path / "yolos")
    command = ["evaluate", str(tmp_path / "yolos"), "--data", str(images), "--coco", str(annotations), "--json"]
    assert main(command) == 0
    assert len(seen) == 16 and {each.category for each in seen} <= {3, 7}
    truth(annotations, seen)
    capsys.readouterr()
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["box_ap"] == 100 and result["mask_ap"] is None and result["images"] == 4
    out = str(tmp_path / "out")
    assert main(["compile", str(tmp_path / "yolos"), "--out", out, "--calib", str(images), *FAST]) == 0
    command[1] = str(tmp_path / "out/model.onnx")
    capsys.readouterr()
    assert main(command) == 0
    assert 50 < json.loads(capsys.readouterr().out)["box_ap"] <= 100


def test_sam_with_boxes_and_a_compiled_encoder(
    tmp_path: Path, seen: list[Detection], capsys: pytest.CaptureFixture[str]
) -> None:
    """The truth is what the float model draws."""
    annotations, images = coco.write(tmp_path)
    torch.manual_seed(0)
    redraw(sam()).save_pretrained(tmp_path / "sam")  # type: ignore[operator]
    boxes = [{"image_id": n, "category_id": c, "bbox": box, "score": 0.5 + n / 10}
             for n, objects in enumerate(coco.RECTANGLES, 1) for c, *box in objects]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    command = ["evaluate", str(tmp_path / "sam"), "--data", str(images), "--coco", str(annotations), "--boxes",
               str(tmp_path / "boxes.json"), "--json"]
    assert main(command) == 0
    assert len(seen) == len(boxes) and {each.score for each in seen} == {0.6, 0.7, 0.8, 0.9}
    truth(annotations, seen)
    capsys.readouterr()
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["mask_ap"] == 100
    encoder = tmp_path / "encoder.onnx"
    assert main(["compile", str(tmp_path / "sam"), "--module", "vision_encoder", "--out", str(encoder), "--calib",
                 str(images), *FAST]) == 0
    capsys.readouterr()
    assert main([*command, "--module", f"vision_encoder={encoder}"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 30 < result["mask_ap"] <= 100 and result["box_ap"] is None
    assert main([*command, "--module", f"mask_decoder={encoder}"]) == 2
    assert "was not compiled from mask_decoder" in capsys.readouterr().err
    with pytest.raises(InputError, match="box-prompts is of models that take pixel_values and input_boxes"):
        open_prompted(Source("timm:vit_tiny_patch16_224,img_size=16,depth=1"))


def test_images_and_masks_of_sam_are_those_of_its_processor() -> None:
    from transformers import SamImageProcessor

    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    processor = SamImageProcessor(size={"longest_edge": 48}, pad_size={"height": 48, "width": 48})
    picture = (image.permute(1, 2, 0) * 255).round().to(torch.uint8)
    expected = processor(picture.numpy(), return_tensors="pt")
    mine, size = fitted(picture.permute(2, 0, 1).float() / 255, 48, None)
    assert size == tuple(expected["reshaped_input_sizes"][0].tolist())
    assert (mine - expected["pixel_values"][0]).abs().max() < 0.02


class Scored(Seer):
    """Scores by a layer."""

    def __init__(self) -> None:
        super().__init__(masks=False)
        self.backbone = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        scores = self.backbone(torch.stack([image.mean((1, 2)) for image in images])).sigmoid().mean(1)
        return [{**self.see(image), "scores": score.expand(len(self.see(image)["labels"]))}
                for image, score in zip(images, scores)]


def test_a_detector_of_lists_with_a_compiled_backbone(
    tmp_path: Path, seen: list[Detection], capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, images = coco.write(tmp_path)
    torch.save(redraw(Scored()), tmp_path / "detector.pt")
    detector = [str(tmp_path / "detector.pt"), "--allow-pickle"]
    command = ["evaluate", *detector, "--data", str(images), "--coco", str(annotations), "--json"]
    assert main(command) == 0
    before = [each.score for each in seen]
    np.save(tmp_path / "calib.npy", np.random.default_rng(0).random((4, 3, 32, 32), dtype=np.float32))
    backbone = tmp_path / "backbone.onnx"
    assert main(["compile", *detector, "--module", "backbone", "--input-shape", "3,32,32", "--out", str(backbone),
                 "--calib", str(tmp_path / "calib.npy"), *FAST]) == 0
    capsys.readouterr()
    assert main([*command, "--module", f"backbone={backbone}"]) == 0
    assert json.loads(capsys.readouterr().out)["box_ap"] == 100
    after = [each.score for each in seen]
    assert after != before and np.allclose(after, before, atol=0.05)
    assert main([*command, "--module", "backbone"]) == 2
    assert "expected PATH=FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_a_detector_of_torchvision_with_a_compiled_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, images = coco.write(tmp_path)
    spec = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn,fixed_size=(64,64),box_score_thresh=0.0"
    backbone = tmp_path / "backbone.onnx"
    np.save(tmp_path / "calib.npy", np.random.default_rng(0).random((4, 3, 64, 64), dtype=np.float32))
    assert main(["compile", spec, "--module", "backbone", "--input-shape", "3,64,64", "--out", str(backbone),
                 "--calib", str(tmp_path / "calib.npy"), *FAST]) == 0
    capsys.readouterr()
    command = ["evaluate", spec, "--data", str(images), "--coco", str(annotations), "--json"]
    assert main([*command, "--module", f"backbone={backbone}", "--limit", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2


@pytest.mark.parametrize(("path", "value", "words"), [
    (("images", 1, "file_name"), "../../etc/passwd", r"images\[1\]: the file_name .* leads out of"),
    (("images", 0, "height"), 10**9, r"images\[0\]: an image of"),
    (("images", 0, "id"), "1", r"images\[0\]: id must be a whole number"),
    (("annotations", 2, "bbox"), [0, 0, float("nan"), 1], r"annotations\[2\]: bbox must be"),
    (("annotations", 0, "image_id"), 99, "image 99 or category 3 is not in the file"),
    (("annotations", 0, "segmentation"), [[0, 0, 1]], "a polygon is a list"),
    (("annotations", 0, "segmentation"), {"size": [30, 40], "counts": [5, 7]}, "do not add up to 1200"),
    (("annotations", 0, "segmentation"), {"size": [30, 40], "counts": "ZZZZZZZZZZZZ"}, "run lengths of a mask"),
    (("annotations", 0, "segmentation"), {"size": [1, 1], "counts": "1"}, "a mask of 1x1 on an image of 40x30"),
    (("categories",), {}, "categories must be a list"),
    (("images",), [], "there are no images"),
])
def test_hostile_annotations_are_named(tmp_path: Path, path: tuple[Any, ...], value: Any, words: str) -> None:
    annotations, images = coco.write(tmp_path)
    stored = json.loads(annotations.read_text())
    place = stored
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    annotations.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=words):
        read_annotations(annotations, images)


def test_corners_far_outside_are_cut_off(tmp_path: Path) -> None:
    annotations, images = coco.write(tmp_path, lambda box, size: [[-1e300, 0, 1e300, 0, 5, 1e300]])
    (corners,) = read_annotations(annotations, images).objects[1][0]["segmentation"]
    assert min(corners) == -1 and max(corners) == 41


def test_boxes_and_options_that_do_not_fit(tmp_path: Path) -> None:
    path, images = coco.write(tmp_path)
    annotations = read_annotations(path, images)
    boxes = tmp_path / "boxes.json"
    for stored, words in (
        ("{}", "expected a list"),
        ("[{}]", r"\[0\]: no 'image_id'"),
        ("[", "not valid JSON"),
        ('[{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3], "score": 1}]', r"\[0\]: bbox must be"),
        ('[{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": NaN}]', "not finite"),
    ):
        boxes.write_text(stored)
        with pytest.raises(InputError, match=words):
            read_prompts(boxes, annotations)
    boxes.write_text('[{"image_id": 77, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 1}]')
    assert read_prompts(boxes, annotations) == {}
    timm = "timm:vit_tiny_patch16_224,img_size=16,depth=1"
    for options, words in (({"metric": "detection"}, "detection needs --coco"),
                           ({"coco": path, "tokenizer": "x"}, "--tokenizer does not belong to the metric detection"),
                           ({"coco": path}, "no detector that takes a list of images")):
        with pytest.raises(InputError, match=words):
            evaluate(timm, str(images), **options)  # type: ignore[arg-type]
    (images / "000000000002.png").unlink()
    with pytest.raises(InputError, match=r"000000000002\.png"):
        detection(Seer(), images, coco=path)


def test_a_model_of_other_outputs_or_sizes_is_refused(tmp_path: Path) -> None:
    from repquant_fx.calibration.inputs import InputSpec

    path, images = coco.write(tmp_path)
    takes = InputSpec("x", (None, 3, 8, 8), torch.float32)
    runner = Runner(lambda feed: {"y": torch.zeros(4, 3)}, (takes,), ("n",), "m")
    with pytest.raises(InputError, match=r"needs logits of queries .*; m gives y \[4, 3\]"):
        detection(runner, images, coco=path, batch_size=4)
    stored = json.loads(path.read_text())
    stored["images"][0].update(width=41)
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match="40x30 pixels, by the annotations 41x30"):
        detection(Seer(), images, coco=path)
    assert encode_mask(torch.eye(3) > 0)["size"] == [3, 3]
