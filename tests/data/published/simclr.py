"""SimCLR in the style of public training loops (Chen et al. 2020): logits and labels for CrossEntropyLoss."""

import torch
import torch.nn.functional as F


class SimCLR:
    def __init__(self, model, temperature=0.07, n_views=2):
        self.model = model
        self.temperature = temperature
        self.n_views = n_views
        self.criterion = torch.nn.CrossEntropyLoss()

    def info_nce_loss(self, features):
        batch_size = features.shape[0] // self.n_views
        labels = torch.cat([torch.arange(batch_size) for i in range(self.n_views)], dim=0)
        features = F.normalize(features, dim=1)
        labels = (labels.unsqueeze(0) == labels.unsqueeze(1)).float()
        similarity_matrix = torch.matmul(features, features.T)

        mask = torch.eye(labels.shape[0], dtype=torch.bool)
        labels = labels[~mask].view(labels.shape[0], -1)
        similarity_matrix = similarity_matrix[~mask].view(similarity_matrix.shape[0], -1)
        positives = similarity_matrix[labels.bool()].view(labels.shape[0], -1)
        negatives = similarity_matrix[~labels.bool()].view(similarity_matrix.shape[0], -1)

        logits = torch.cat([positives, negatives], dim=1)
        labels = torch.zeros(logits.shape[0], dtype=torch.long)
        logits = logits / self.temperature
        return logits, labels

    def step(self, images):
        features = self.model(torch.cat(images, dim=0))
        logits, labels = self.info_nce_loss(features)
        loss = self.criterion(logits, labels)
        top1 = (logits.argmax(1) == labels).float().mean()
        return loss, top1
