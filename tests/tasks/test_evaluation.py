import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss, recall_score

from vision_ssm.tasks.evaluation import Evaluation


@pytest.mark.parametrize("classes", [2, 3, 12])
def test_figures_agree_with_scikit_learn(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.rand(200, classes, generator=generator, dtype=torch.float64)
    probabilities = logits.softmax(1).float()
    targets = torch.randint(classes - 1, (200,), generator=generator)  # the last class has no image
    names = tuple(f"class {i}" for i in range(classes))
    evaluation = Evaluation(names, probabilities, targets)
    guesses = probabilities.argmax(1)
    assert evaluation.accuracy == pytest.approx(float((guesses == targets).float().mean()))
    recalls = recall_score(targets, guesses, labels=range(classes - 1), average=None)
    assert evaluation.balanced_accuracy == pytest.approx(recalls.mean())
    assert evaluation.confusion.tolist() == confusion_matrix(targets, guesses, labels=range(classes)).tolist()
    assert evaluation.loss == pytest.approx(log_loss(targets, logits.softmax(1), labels=range(classes)), rel=1e-5)
    assert ("top5_accuracy" in evaluation.summary()) == (classes > 5)
    assert evaluation.per_class()[-1]["recall"] is None
