-- worker
go_on_when_full()
forget_worker(ARGV[2])
return 0
