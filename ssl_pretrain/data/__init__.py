"""Images and labels, without torch: files to pixels (`decode`), pixels to a pack (`pack`), labels (`readers`)."""
