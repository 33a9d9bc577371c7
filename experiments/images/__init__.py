"""What the experiments on images share, whatever generates them: data, files of samples."""
