"""Detection as a measure of encoders: Mask R-CNN with FPN, fine-tuned on COCO-format data, judged by AP."""
