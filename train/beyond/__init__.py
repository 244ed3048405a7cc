"""What is done with a trained network: predict, embed, probe, look for anomalies, score elsewhere; nothing is learnt anew."""
