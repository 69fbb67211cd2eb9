import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, log_loss, recall_score, top_k_accuracy_score

from vision_ssm.recipes import ClassificationConfig
from vision_ssm.tasks.classification import Classification, ClassifierSpec
from vision_ssm.tasks.results import ClassificationResults


class Known(torch.nn.Module):
    """Returns the logits that stand in the pixels."""

    def forward(self, images):
        return images.flatten(1)


@pytest.mark.parametrize("classes", [2, 3, 12])
def test_metrics_agree_with_scikit_learn(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.rand(200, classes, generator=generator)
    labels = torch.randint(classes - 1, (200,), generator=generator)  # the last class has no image
    names = tuple(f"class {i}" for i in range(classes))
    task = Classification(Known(), ClassifierSpec.from_config(ClassificationConfig(model="test_convnext"), names))
    metrics, records, ids = task.metrics(), [], [str(i) for i in range(200)]
    for part in (slice(0, 7), slice(7, 150), slice(150, 200)):
        records += task.evaluation_step(
            task.model, {"image": logits[part], "label": labels[part], "id": ids[part]}, metrics
        )
    results = task.evaluation(metrics.compute(), records)
    guesses = logits.argmax(1)
    assert results.accuracy == pytest.approx(float((guesses == labels).float().mean()))
    recalls = recall_score(labels, guesses, labels=range(classes - 1), average=None)
    assert results.balanced_accuracy == pytest.approx(recalls.mean())
    assert results.metrics()["worst_recall"] == pytest.approx(recalls.min())
    scores = f1_score(labels, guesses, labels=range(classes - 1), average="macro")
    assert results.metrics()["macro_f1"] == pytest.approx(scores)
    assert results.confusion.tolist() == confusion_matrix(labels, guesses, labels=range(classes)).tolist()
    assert results.loss == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=range(classes)), rel=1e-5)
    assert ("top5_accuracy" in results.metrics()) == (classes > 5)
    if classes > 5:
        expected = top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
        assert results.metrics()["top5_accuracy"] == pytest.approx(expected)
    assert results.details()["per_class"][-1]["recall"] is None
    each = f1_score(labels, guesses, labels=range(classes - 1), average=None)
    assert [row["f1"] for row in results.details()["per_class"][:-1]] == pytest.approx(each)
    assert [record[1] for record in results.records] == guesses.tolist()
    assert [record[3] for record in results.records] == labels.tolist()


def test_interval_is_wilsons():
    """As in Wilson's paper and in statsmodels' proportion_confint(17, 20, method="wilson")."""
    results = ClassificationResults(("a", "b"), 0.5, torch.tensor([[17, 3], [0, 0]]), None)
    assert results.interval == pytest.approx((0.6395, 0.9476), abs=1e-4)
