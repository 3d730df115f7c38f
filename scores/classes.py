"""Scores of images with class labels: the spread inside each class, and the agreement with the label."""

import numpy as np


def class_variance(real: np.ndarray, real_labels: np.ndarray, fake: np.ndarray, fake_labels: np.ndarray) -> dict:
    """{"class_variance"}: variance of the generated images inside a class over that of the real ones, mean over the
    classes; 1 is right. real, fake: any features (N, D). {} when no class has two images on both sides."""
    common = [c for c in np.unique(fake_labels) if (fake_labels == c).sum() > 1 and (real_labels == c).sum() > 1]
    variances = [tuple(x[y == c].var(axis=0, ddof=1).sum() for x, y in ((fake, fake_labels), (real, real_labels)))
                 for c in common]
    ratios = [a / b for a, b in variances if b > 1e-9]      # equal images have no variance
    return {"class_variance": float(np.mean(ratios))} if ratios else {}


def class_scores(real: np.ndarray, real_labels: np.ndarray, fake: np.ndarray, fake_labels: np.ndarray) -> dict:
    """class_variance, and with two classes or more label_agreement: how often a support-vector classifier of the real
    features agrees with the label of a generated image."""
    from sklearn.svm import SVC

    scores = class_variance(real, real_labels, fake, fake_labels)
    if len(np.unique(real_labels)) > 1:
        classifier = SVC(C=10).fit(real, real_labels)
        scores["label_agreement"] = float((classifier.predict(fake) == fake_labels).mean())
    return scores
